"""Student and teacher: loading, hidden states and heads, identity, adapters, the teacher's cache."""
