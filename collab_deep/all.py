"Everything of `collab_deep`, for notebooks: `from collab_deep.all import *`"
from .embedding import *
