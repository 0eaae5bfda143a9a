"""RoutedProduct: the product by its weight inside of a module, such as the router of a mixture, with its experts.

y = F.linear(x, weight) + sum over the selected experts of w_e B_e A_e x,  and the module's own forward goes on with y
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .by_request import ByRequest
from .products import Products
from .routed_linear import RoutedLinear
from .state import Request
from .weighed_linear import WeighedLinear


class _AtProduct(ByRequest):
    def _with_request(self, x: Tensor, request: Request, *args: Any, **kwargs: Any) -> Any:
        with Products(self.base_layer.weight, lambda y, u: self._add_branch(y, u, request)):
            return self.base_layer(x, *args, **kwargs)


class RoutedProduct(_AtProduct, RoutedLinear):
    """In place of a module that `products.is_product`."""


class WeighedProduct(_AtProduct, WeighedLinear):
    """The same with a `Weigher`."""


AT_PRODUCTS = {RoutedLinear: RoutedProduct, WeighedLinear: WeighedProduct}  # in place of a linear layer's class
