"""What exists because of one backend, of several devices, or of several processes."""
