"""The one exception type that leaves the engine: every message is a sentence for the person at the screen."""


class NextStepError(ValueError):
    """Something about a checkpoint, a prompt or a setting is wrong; the message says what and what to do."""
