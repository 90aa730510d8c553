"""launch: how any kernel is described, launched, recorded and repeated."""
