"""The traced program: its operators, its two dialects, and the rewrite between them."""
