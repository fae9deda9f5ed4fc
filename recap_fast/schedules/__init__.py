"""Learning-rate schedules: computed on the host, or moved on in device memory."""
