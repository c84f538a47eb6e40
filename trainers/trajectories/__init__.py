"""The order in which a teacher decides its answers: extracted, stored, read."""
