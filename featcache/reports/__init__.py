"""Records of what was run, and what is made from them: tables and plots."""
