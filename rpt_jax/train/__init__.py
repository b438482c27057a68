"""Training. The package itself can be called: `rpt_jax.train(config, reward=function)` is `rpt_jax.session.train`."""

import sys
import types


class _Callable(types.ModuleType):
    def __call__(self, config, *, reward=None):
        from rpt_jax.session import train

        return train(config, reward=reward)


sys.modules[__name__].__class__ = _Callable
