"""What the trainers and their scripts share."""
