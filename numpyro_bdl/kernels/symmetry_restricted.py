# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Chains on the reference set of a network: one representative of each set of equivalent parameters.

With c(z) the canonical form of a position, K the inner kernel and g a uniform draw from the symmetry group:

.. math::

    \text{record:} \quad z \leftarrow K(z), \quad \text{kept: } c(z)
    \qquad\qquad
    \text{state:} \quad z \leftarrow c(K(g z))

The law of c(z) is the posterior restricted to the reference set and normalized there: the push-forward of the posterior
under c. In ``state``, z has that law, so g z has the posterior, which K keeps.

Source: Wiese et al., *Towards efficient MCMC sampling in Bayesian neural networks by exploiting symmetry*, ECML PKDD
2023 (arXiv 2304.02902), for the reference set; the canonical form and the chains are not those of the paper's code.
"""

import copy
import warnings
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer import HMC, NUTS
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_bdl._checks import check_choice
from numpyro_bdl.kernels.base import StochasticGradientKernel, same
from numpyro_bdl.potential import Potential
from numpyro_bdl.symmetry.action import DOMAINS, Element, apply, canonical_element, random_element, telling_elements
from numpyro_bdl.symmetry.find import failures_of, groups_of
from numpyro_bdl.symmetry.groups import UnitGroups, has_members, leaves

MODES = ("record", "state")


class SymmetryState(namedtuple("SymmetryState", ["state", "unfolded"])):
    """The state of the inner kernel, whose fields are those of this one too.

    - **state** - the inner state, folded: its position, and all that goes with it, in canonical form.
    - **unfolded** - the fields before the fold, from which the chain goes on; {} in the mode ``"state"``.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def _replace(self, **fields: Any) -> "SymmetryState":
        return SymmetryState(self.state._replace(**fields), self.unfolded)


class SymmetryRestricted(MCMCKernel):
    r"""Around any kernel: draws on the symmetry-free reference set of the network.

    .. math::

        z \leftarrow K(z), \quad \text{kept: } c(z) \quad (\text{record})
        \qquad\qquad
        z \leftarrow c(K(g z)), \quad g \sim \text{Unif} \quad (\text{state})

    with K the inner kernel, c the canonical form and g a random symmetry.

    Of a hidden layer of M tanh units there are :math:`M! \, 2^M` equivalent copies in the posterior, and where a chain
    is among them says nothing. Folding all draws onto one copy leaves the law of every prediction as it is, makes
    weights of different chains comparable as far as they can be, and keeps functional modes apart.

    All that is recorded is folded by the element of its position: state fields shaped like it (an anchor, a gradient, a
    mask) and mutable collections. Masks and inclusion probabilities belong to each draw then, as its units do.

    :param kernel: A kernel of this package, NUTS, HMC, or any other that has a position in ``z``.
    :param groups: From :func:`~numpyro_bdl.symmetry.find_model_groups`, or written by hand. None finds those of the
        model when a run starts.
    :param domain: Which representative: see :func:`~numpyro_bdl.symmetry.canonicalize`.
    :param mode: ``"record"`` folds what is recorded, and is exact for every kernel. ``"state"`` moves the chain itself
        to a random copy before each draw and folds it after, which mixes over copies; it is exact for HMC and NUTS, and
        for the kernels of this package without a preconditioner, and refused for others. What adapts in warm-up then
        sees all copies.
    :raises TypeError: if ``kernel`` is no MCMC kernel.
    :raises ValueError: for arguments out of range, an ensemble kernel, a mode that would not be exact; and, when a run
        starts, for groups that are no symmetry of the model, and a prior that a group does not leave as it is.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flax import linen as nn
        >>> from jax import random
        >>> from numpyro.contrib.module import random_flax_module
        >>> from numpyro.infer import MCMC, NUTS
        >>> import numpyro_bdl as bdl
        >>> def model(x, y):
        ...     net = random_flax_module("net", nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(1)]),
        ...                              dist.Normal(0, 1), input_shape=(1, 1))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("y", dist.Normal(net(x)[:, 0], 0.1), obs=y)
        >>> x = jnp.linspace(-1, 1, 20)[:, None]
        >>> kernel = bdl.SymmetryRestricted(NUTS(model, max_tree_depth=4))
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
        >>> mcmc.run(random.key(0), x, jnp.sin(3 * x[:, 0]))
        >>> print(kernel.unit_groups)
        group         units  signs  pointwise  axes
        net/layers_0  3      yes    odd        net/layers_0.kernel[1], net/layers_0.bias[0], net/layers_2.kernel[0]
        equivalent copies: 10^1.7
        >>> biases = mcmc.get_samples()["net/layers_0.bias"]
        >>> bool((biases[:, 0] > 0).all()), bool((jnp.diff(biases, axis=1) > 0).all())
        (True, True)

    **References:** Wiese et al., ECML PKDD 2023 (arXiv 2304.02902), section on the reference set.
    """

    def __init__(
        self, kernel: MCMCKernel, groups: UnitGroups | None = None, *, domain: str = "bias", mode: str = "record"
    ):
        if not isinstance(kernel, MCMCKernel):
            raise TypeError(f"SymmetryRestricted needs an MCMC kernel, got {type(kernel).__name__}.")
        if groups is not None and not isinstance(groups, UnitGroups):
            raise TypeError(
                "SymmetryRestricted: groups must come from symmetry.find_groups, or be written as UnitGroups.of(...),"
                f" got {type(groups).__name__}."
            )
        if kernel.is_ensemble_kernel:
            raise ValueError(
                f"SymmetryRestricted: {type(kernel).__name__} moves its chains together, and can't be restricted; fold"
                " its draws by symmetry.fold_draws."
            )
        check_choice("SymmetryRestricted", "domain", domain, DOMAINS)
        check_choice("SymmetryRestricted", "mode", mode, MODES)
        self.kernel: Any = kernel
        self.domain, self.mode = domain, mode
        self._user_groups = groups
        self._unit_groups: UnitGroups | None = groups
        self._met: tuple[tuple, dict] | None = None
        if mode == "state":
            self._refuse_state()

    def __getattr__(self, name: str) -> Any:
        # what the library asks of a kernel it asks of the one inside
        if name == "kernel" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.kernel, name)

    @property
    def unit_groups(self) -> UnitGroups:
        """The groups of units, found when a run starts."""
        if self._unit_groups is None:
            raise RuntimeError("SymmetryRestricted has not met its model's arguments yet; run MCMC first.")
        return self._unit_groups

    # ---- what moves with the position -------------------------------------------------------------------------

    def _vectors(self, state) -> tuple[str, ...]:
        """State fields that an element permutes and flips."""
        named = ("z", "z_grad", *getattr(self.kernel, "parameter_fields", ()))
        return tuple(n for n in named if n not in self._magnitudes() and isinstance(getattr(state, n, None), dict))

    def _magnitudes(self) -> tuple[str, ...]:
        """State fields that an element permutes: what has no sign."""
        return getattr(self.kernel, "magnitude_fields", ())

    def _acted_on(self, state, element: Element) -> dict[str, Any]:
        """The state fields that an element changes."""
        fields = {name: apply(element, getattr(state, name)) for name in self._vectors(state)}
        fields |= {name: apply(element, getattr(state, name), signs=False) for name in self._magnitudes()}
        if has_members(getattr(state, "mutable", ()), self.unit_groups):
            fields["mutable"] = apply(element, state.mutable)
        if isinstance(self.kernel, StochasticGradientKernel):
            fields |= self.kernel._moved(state, lambda tree: apply(element, tree, signs=False))
        return fields

    def _fold(self, state) -> SymmetryState:
        if not self.unit_groups.groups:
            return SymmetryState(state, {})
        tree = state.z | (state.mutable if jax.tree.leaves(getattr(state, "mutable", ())) else {})
        fields = self._acted_on(state, canonical_element(tree, self.unit_groups, self.domain))
        before = {name: getattr(state, name) for name in fields} if self.mode == "record" else {}
        return SymmetryState(state._replace(**fields), before)

    def _unfold(self, state: SymmetryState):
        inner = state.state._replace(**state.unfolded)
        if self.mode == "record" or not self.unit_groups.groups:
            return inner
        # a number that no kernel splits its key by
        draw = lambda key: random_element(random.fold_in(key, 0x5EED), self.unit_groups)
        element = (draw if is_prng_key(inner.rng_key) else jax.vmap(draw))(inner.rng_key)
        return inner._replace(**self._acted_on(inner, element))

    # ---- NumPyro's contract -----------------------------------------------------------------------------------

    @property
    def sample_field(self) -> str:
        """The state field that is the position."""
        return self.kernel.sample_field

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The state fields that MCMC collects."""
        return self.kernel.default_fields

    @property
    def is_ensemble_kernel(self) -> bool:
        """Whether the inner kernel moves its chains together."""
        return self.kernel.is_ensemble_kernel

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        """The first state of a chain, or of a batch of chains; see NumPyro's MCMCKernel."""
        state = self.kernel.init(rng_key, num_warmup, init_params, model_args, model_kwargs)
        self._meet(state, model_args, model_kwargs or {})
        return self._fold(state)

    def sample(self, state, model_args, model_kwargs):
        """The state one draw later; see NumPyro's MCMCKernel."""
        return self._fold(self.kernel.sample(self._unfold(state), model_args, model_kwargs))

    def postprocess_fn(self, model_args, model_kwargs):
        """That of the inner kernel, which is given folded positions."""
        return self.kernel.postprocess_fn(model_args, model_kwargs)

    def refresh(self, state, model_args, model_kwargs):
        """The state under other arguments of the model (for NumPyro's Gibbs)."""
        inner = state.state._replace(**state.unfolded)
        return self._fold(self.kernel.refresh(inner, model_args, model_kwargs))

    def wrap_model(self, wrapper):
        """A copy of the kernel for the wrapped model (for NumPyro's Gibbs)."""
        kernel = copy.copy(self)
        kernel.kernel, kernel._met = self.kernel.wrap_model(wrapper), None
        return kernel

    def __getstate__(self):
        return self.__dict__ | {"_met": None}

    def get_diagnostics_str(self, state) -> str:
        """The text behind the progress bar."""
        return self.kernel.get_diagnostics_str(state.state)

    # ---- the model at hand ------------------------------------------------------------------------------------

    def _refuse_state(self) -> None:
        name, why = type(self.kernel).__name__, None
        if isinstance(self.kernel, StochasticGradientKernel):
            if self.kernel._preconditioner.adapts:
                why = "its preconditioner adapts, and is not the same for all units"
            elif self.kernel.magnitude_fields:
                why = f"it keeps {', '.join(self.kernel.magnitude_fields)}, which differ from unit to unit"
        elif type(self.kernel) not in (HMC, NUTS):
            why = "only HMC, NUTS and the kernels of this package are known to be exact there"
        if why:
            raise ValueError(_not_exact(name, why))

    def _meet(self, state, args: tuple, kwargs: dict) -> None:
        """Find the groups and check them, once for the arguments of a run."""
        if self._met is not None and same(self._met, (args, kwargs)):
            return
        if self.kernel.sample_field != "z" or not isinstance(state.z, dict):
            raise ValueError(
                f"SymmetryRestricted needs a kernel whose position is a dict of sites in the field 'z', which"
                f" {type(self.kernel).__name__} has not."
            )
        batch = 0 if is_prng_key(state.rng_key) else 1
        z = {name: jax.ShapeDtypeStruct(x.shape[batch:], x.dtype) for name, x in state.z.items()}
        with jax.ensure_compile_time_eval():  # chains may be begun under a transformation
            potential = getattr(self.kernel, "_potential", None)
            if potential is None and getattr(self.kernel, "model", None) is not None:
                potential = Potential(self.kernel.model, args, kwargs)
            if self._user_groups is None:
                if potential is None:
                    raise ValueError(
                        "SymmetryRestricted: a kernel with a potential_fn has no model in which to find groups of"
                        " units; write them as groups=UnitGroups.of(...)."
                    )
                self._unit_groups = groups_of(potential)
            self._check_groups(z, state, potential)
            if self.mode == "state" and isinstance(self.kernel, StochasticGradientKernel):
                self._check_preconditioner(z)
            self._check_target(z, potential, args, kwargs)
        if not self.unit_groups.groups:
            warnings.warn(
                "SymmetryRestricted: no group of units was found, and nothing is folded. Left out are"
                f" {'; '.join(self.unit_groups.left_out) or 'none'}. Of a network with dropout, give the groups that it"
                " has without: groups=symmetry.find_model_groups(model, ..., train=False).",
                stacklevel=4,
            )
        self._met = args, kwargs

    def _check_preconditioner(self, z: dict) -> None:
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in z.items()}
        preconditioner = self.kernel._preconditioner
        diagonal = preconditioner.diagonal(preconditioner.init(zeros), zeros)
        diagonal = {name: jnp.broadcast_to(p, z[name].shape) for name, p in diagonal.items()}
        for element in telling_elements(self.unit_groups):
            moved = apply(element, diagonal, signs=False)
            for name, p in diagonal.items():
                if not np.array_equal(p, moved[name]):
                    why = f"its preconditioner differs between units that can be exchanged, at the site '{name}'"
                    raise ValueError(_not_exact(type(self.kernel).__name__, why))

    def _check_groups(self, z: dict, state, potential: Potential | None) -> None:
        known = {*((name,) for name in z), *leaves(getattr(state, "mutable", {}))}
        for path, _ in self.unit_groups.shapes:
            if path not in known:
                raise ValueError(
                    f"SymmetryRestricted: the groups name '{'/'.join(path)}', which is no site of the model; its sites"
                    f" are: {', '.join(z)}."
                )
        if self._user_groups is not None and potential is not None:
            failed = failures_of(self.unit_groups, potential)
            if failed is None:
                warnings.warn(
                    "SymmetryRestricted: the groups could not be checked, since the model differs from run to run, as"
                    " with dropout. Take them from the model without it: groups=symmetry.find_model_groups(model, ...,"
                    " train=False).",
                    stacklevel=5,
                )
            if failed:
                raise ValueError(f"SymmetryRestricted: no symmetry of the model: {'; '.join(failed.values())}.")

    def _check_target(self, z: dict, potential: Potential | None, args: tuple, kwargs: dict) -> None:
        """The gradient of the prior at an equivalent position must be the equivalent gradient, in every coordinate."""
        mutable = {} if potential is None else potential.initial(random.key(0))[1]

        @jax.jit
        def gradient(z):
            if potential is None:
                return jax.grad(self.kernel._potential_fn)(z)
            found = jax.grad(lambda z: potential.energies(z, {}, random.key(0), mutable, args, kwargs)[0].prior)(z)
            own = isinstance(self.kernel, StochasticGradientKernel)
            return self.kernel._prior_gradient(z, found) if own else found

        rng = np.random.default_rng(0)
        for _ in range(3):
            # of all sizes, as a spike and a slab are seen at different ones
            size = {n: 10.0 ** rng.uniform(-2, 0.3, x.shape) * rng.choice([-1, 1], x.shape) for n, x in z.items()}
            point = {n: size[n].astype(x.dtype) for n, x in z.items()}
            there = gradient(point)
            for group in self.unit_groups:
                for element in telling_elements(self.unit_groups, group.name):
                    self._compare(group.name, apply(element, there), gradient(apply(element, point)))

    @staticmethod
    def _compare(group: str, expected: dict, found: dict) -> None:
        for name, value in expected.items():
            scale = 1e-6 + np.max(np.abs(value), initial=0)
            if not np.max(np.abs(value - found[name]), initial=0) <= 1e-3 * scale:
                raise ValueError(
                    f"SymmetryRestricted: the prior is not the same for equivalent networks: an element of the group"
                    f" '{group}' changes it at the site '{name}'. Its units need one law, symmetric about 0 if their"
                    " signs are flipped. Give them one, or leave the group out:"
                    " groups=find_model_groups(...).only(...)."
                )


def _not_exact(kernel: str, why: str) -> str:
    return (
        f'SymmetryRestricted: mode="state" would not leave the posterior invariant with {kernel}: {why}. Use'
        ' mode="record", which is exact for any kernel.'
    )
