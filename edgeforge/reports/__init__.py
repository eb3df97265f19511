"""Reports over several artifacts: a page to look at, and a table of paired differences."""
