"Everything of `collab_deep`, for notebooks: `from collab_deep.all import *`"

# WRITTEN BY nbdev-export! DO NOT EDIT! Rooms as in settings.ini, modules in the order of notebooks.

from .models.embedding import *
from .models.base import *
from .models.dot import *
from .models.nn import *
from .models.features import *
from .models.factor import *
from .models.ensemble import *
from .models.weights import *
from .models.sharded import *
from .data.movielens import *
from .data.splits import *
from .data.table import *
from .data.loaders import *
from .lists.csr import *
from .lists.recommender import *
from .lists.top import *
from .lists.fold_in import *
from .lists.recommend import *
from .lists.evaluate import *
from .lists.check import *
from .train.losses import *
from .train.optimizer import *
from .train.learner import *
from .train.stopping import *
from .train.ensemble import *
from .use.explain import *
from .use.save import *
from .use.report import *
