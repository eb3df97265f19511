"""What each operation of MIL computes, one file a group."""
