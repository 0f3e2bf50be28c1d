"""What the readers raise. Both are ``ValueError``: the file given is the value that cannot be used."""


class DataError(ValueError):
    """A file of data that is missing, damaged or not what it says. The message names the file, and where in it."""


class VideoError(DataError):
    """A video, a folder of frames or a folder of videos that cannot be used. The message names the path."""
