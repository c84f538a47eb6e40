"""Curves side by side: scored, ranked, drawn and written."""
