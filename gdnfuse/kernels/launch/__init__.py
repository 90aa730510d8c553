"""launch: how a kernel is described, launched, recorded and repeated, whichever it is."""
