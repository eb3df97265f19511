"""The traced program: its operators, its two dialects, and the rewrite from one to the other."""
