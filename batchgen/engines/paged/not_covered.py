"""What is raised where a model asks for something that this engine does not do."""


class NotCovered(Exception):
    """A model that is not covered; the message goes on "does not cover this model:"."""
