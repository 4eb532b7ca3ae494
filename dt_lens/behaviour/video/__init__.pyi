from .video import side_by_side as side_by_side
