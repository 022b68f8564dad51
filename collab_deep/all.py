"Everything of `collab_deep`, for notebooks: `from collab_deep.all import *`"
from .data import *
from .embedding import *
from .evaluate import *
from .explain import *
from .ensemble import *
from .factor_model import *
from .fold_in import *
from .implicit import *
from .learner import *
from .loaders import *
from .models import *
from .recommend import *
from .report import *
from .save import *
from .splits import *
