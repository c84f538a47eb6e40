"""What is asked, and when an answer counts as right."""
