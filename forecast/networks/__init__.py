"""Networks: from the frames of the past to raw numbers for a head."""
