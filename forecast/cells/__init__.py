"""One time step of a recurrence: vector cells and convolutional cells are the same equations with another linear map."""
