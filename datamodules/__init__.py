"""Where the frames come from: Lightning datamodules that deal `forecast.batch.Batch`."""
