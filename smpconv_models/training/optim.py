"""Parameter groups as the paper trains them."""
from typing import Any, Dict, List, Optional

from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from smpconv_models.layers import smp_layers


def param_groups(
        model: Any,
        weight_decay: float,
        layer_decay: Optional[float] = None,
        radius_lr_scale: float = 0.1,
) -> List[Dict[str, Any]]:
    """timm's parameter groups, with the radii of the points in groups of their own at a lower rate.

    No weight decay on 1-D parameters, biases, coordinates, radii, and what the model's ``no_weight_decay()`` lists.
    The rates are relative, under ``lr_scale``, which timm's schedulers multiply by.

    Args:
        model: Any model; without SMP layers the groups are timm's.
        weight_decay: Of the parameters that have one.
        layer_decay: Factor of the rate from each layer to the one before it; None for one rate.
        radius_lr_scale: Rate of the radii over that of their layer's other parameters (0.1 in the paper, A.1).
    """
    layers = smp_layers(model).values()
    radii = {id(layer.radius) for layer in layers}
    free = radii | {id(layer.coords) for layer in layers}
    # by module, not by the model's word alone: a wrapper (features_only) has lost it
    no_decay = {name for name, param in model.named_parameters() if id(param) in free}
    if hasattr(model, 'no_weight_decay'):
        no_decay |= set(model.no_weight_decay())
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, layer_decay=layer_decay, no_weight_decay_list=no_decay)
    split = []
    for group in groups:
        for is_radius in (False, True):
            params = [param for param in group['params'] if (id(param) in radii) == is_radius]
            if params:
                scale = group.get('lr_scale', 1.) * (radius_lr_scale if is_radius else 1.)
                split.append({**group, 'params': params, 'lr_scale': scale})
    return split
