"""`edgeforge check`: holds artifacts against a policy and a baseline, as CI does."""
