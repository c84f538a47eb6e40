"""Answers while they are decided and afterwards: streams, terminal, conversation, trace."""
