"""What the readers raise. Both are ``ValueError``: the file given is the value that cannot be used."""


class DataError(ValueError):
    """A data file that is missing, damaged or of another format. The message names the file and the place in it."""


class VideoError(DataError):
    """A video, a folder of frames or a folder of videos that cannot be read. The message names the path."""
