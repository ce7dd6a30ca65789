"""The OpenAI API over the engine: requests, answers, streams and errors."""
