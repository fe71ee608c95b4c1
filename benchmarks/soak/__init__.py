"""Mixed load for minutes, with callers that give up and requests that are wrong; then what must still be true."""
