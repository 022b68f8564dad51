"Everything of `collab_deep`, for notebooks: `from collab_deep.all import *`"
from .data import *
from .embedding import *
from .loaders import *
from .splits import *
