# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What to cite for a kernel, a guide, a posterior or a run, as BibTeX.

To add a class, put its paper into ``BIBLIOGRAPHY`` and its name into ``BY_CLASS``, which is looked up by the name of
the class and of its bases.
"""

from typing import Any

from numpyro.contrib.einstein import SteinVI
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMCKernel

from numpyro_bdl.gp.posterior import GPPosterior
from numpyro_bdl.linear.samples import LinearPosterior

BIBLIOGRAPHY: dict[str, str] = {
    "numpyro_bdl": """@software{numpyro_bdl,
  author = {{Contributors to the numpyro_bdl project}},
  title = {{numpyro_bdl}: {Bayesian} deep learning for {NumPyro}},
}""",
    "phan2019composable": """@article{phan2019composable,
  author = {Phan, Du and Pradhan, Neeraj and Jankowiak, Martin},
  title = {Composable Effects for Flexible and Accelerated Probabilistic Programming in {NumPyro}},
  journal = {arXiv preprint arXiv:1912.11554},
  year = {2019},
}""",
    "bingham2019pyro": """@article{bingham2019pyro,
  author = {Bingham, Eli and Chen, Jonathan P. and Jankowiak, Martin and Obermeyer, Fritz and Pradhan, Neeraj and
            Karaletsos, Theofanis and Singh, Rohit and Szerlip, Paul A. and Horsfall, Paul and Goodman, Noah D.},
  title = {Pyro: Deep Universal Probabilistic Programming},
  journal = {Journal of Machine Learning Research},
  volume = {20},
  pages = {28:1--28:6},
  year = {2019},
  url = {http://jmlr.org/papers/v20/18-403.html},
}""",
    "jax2018github": """@software{jax2018github,
  author = {James Bradbury and Roy Frostig and Peter Hawkins and Matthew James Johnson and Yash Katariya and Chris Leary
            and Dougal Maclaurin and George Necula and Adam Paszke and Jake Vander{P}las and Skye Wanderman-{M}ilne and
            Qiao Zhang},
  title = {{JAX}: composable transformations of {Python}+{NumPy} programs},
  url = {http://github.com/jax-ml/jax},
  year = {2018},
}""",
    "martin2026arviz": """@article{martin2026arviz,
  author = {Martin, Osvaldo A. and Abril-Pla, Oriol and Deklerk, Jordan and Axen, Seth D. and Carroll, Colin and
            Hartikainen, Ari and Vehtari, Aki},
  title = {{ArviZ}: a modular and flexible library for exploratory analysis of {Bayesian} models},
  journal = {Journal of Open Source Software},
  volume = {11},
  number = {119},
  pages = {9889},
  year = {2026},
  doi = {10.21105/joss.09889},
}""",
    "welling2011bayesian": """@inproceedings{welling2011bayesian,
  author = {Welling, Max and Teh, Yee Whye},
  title = {{Bayesian} Learning via Stochastic Gradient {Langevin} Dynamics},
  booktitle = {Proceedings of the 28th International Conference on Machine Learning},
  pages = {681--688},
  year = {2011},
}""",
    "chen2014stochastic": """@inproceedings{chen2014stochastic,
  author = {Chen, Tianqi and Fox, Emily and Guestrin, Carlos},
  title = {Stochastic Gradient {Hamiltonian} {Monte} {Carlo}},
  booktitle = {Proceedings of the 31st International Conference on Machine Learning},
  pages = {1683--1691},
  year = {2014},
}""",
    "li2024entropy": """@inproceedings{li2024entropy,
  author = {Li, Bolian and Zhang, Ruqi},
  title = {Entropy-{MCMC}: Sampling from Flat Basins with Ease},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2310.05401},
  archiveprefix = {arXiv},
}""",
    "bruno2025flatness": """@article{bruno2025flatness,
  author = {Bruno, Stefano and Hwang, Youngsik and An, Jaehyeon and Sabanis, Sotirios and Lim, Dong-Young},
  title = {Flatness-Aware Stochastic Gradient {Langevin} Dynamics},
  journal = {arXiv preprint arXiv:2510.02174},
  year = {2025},
}""",
    "ke2022optimization": """@article{ke2022optimization,
  author = {Ke, Xiongwen and Fan, Yanan},
  title = {On the Optimization and Pruning for {Bayesian} Deep Learning},
  journal = {arXiv preprint arXiv:2210.12957},
  year = {2022},
}""",
    "deng2019adaptive": """@inproceedings{deng2019adaptive,
  author = {Deng, Wei and Zhang, Xiao and Liang, Faming and Lin, Guang},
  title = {An Adaptive Empirical {Bayesian} Method for Sparse Deep Learning},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {32},
  pages = {5563--5573},
  year = {2019},
}""",
    "wiese2023towards": """@inproceedings{wiese2023towards,
  author = {Wiese, Jonas Gregor and Wimmer, Lisa and Papamarkou, Theodore and Bischl, Bernd and G{\\"u}nnemann, Stephan
            and R{\\"u}gamer, David},
  title = {Towards Efficient {MCMC} Sampling in {Bayesian} Neural Networks by Exploiting Symmetry},
  booktitle = {Machine Learning and Knowledge Discovery in Databases: Research Track, ECML PKDD 2023},
  year = {2023},
  eprint = {2304.02902},
  archiveprefix = {arXiv},
}""",
    "wild2023rigorous": """@inproceedings{wild2023rigorous,
  author = {Wild, Veit David and Ghalebikesabi, Sahra and Sejdinovic, Dino and Knoblauch, Jeremias},
  title = {A Rigorous Link between Deep Ensembles and (Variational) {Bayesian} Methods},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {36},
  year = {2023},
  eprint = {2305.15027},
  archiveprefix = {arXiv},
}""",
    "zhang2020cyclical": """@inproceedings{zhang2020cyclical,
  author = {Zhang, Ruqi and Li, Chunyuan and Zhang, Jianyi and Chen, Changyou and Wilson, Andrew Gordon},
  title = {Cyclical Stochastic Gradient {MCMC} for {Bayesian} Deep Learning},
  booktitle = {International Conference on Learning Representations},
  year = {2020},
  eprint = {1902.03932},
  archiveprefix = {arXiv},
}""",
    "li2016preconditioned": """@inproceedings{li2016preconditioned,
  author = {Li, Chunyuan and Chen, Changyou and Carlson, David and Carin, Lawrence},
  title = {Preconditioned Stochastic Gradient {Langevin} Dynamics for Deep Neural Networks},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume = {30},
  number = {1},
  year = {2016},
  doi = {10.1609/aaai.v30i1.10200},
}""",
    "hoffman2014nuts": """@article{hoffman2014nuts,
  author = {Hoffman, Matthew D. and Gelman, Andrew},
  title = {The No-{U}-Turn Sampler: Adaptively Setting Path Lengths in {Hamiltonian} {Monte} {Carlo}},
  journal = {Journal of Machine Learning Research},
  volume = {15},
  number = {47},
  pages = {1593--1623},
  year = {2014},
}""",
    "neal2012mcmc": """@article{neal2012mcmc,
  author = {Neal, Radford M.},
  title = {{MCMC} Using {Hamiltonian} Dynamics},
  journal = {arXiv preprint arXiv:1206.1901},
  year = {2012},
}""",
    "liu2016stein": """@inproceedings{liu2016stein,
  author = {Liu, Qiang and Wang, Dilin},
  title = {{Stein} Variational Gradient Descent: A General Purpose {Bayesian} Inference Algorithm},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {29},
  year = {2016},
}""",
    "antoran2023sampling": """@inproceedings{antoran2023sampling,
  author = {Antor{\\'a}n, Javier and Padhy, Shreyas and Barbano, Riccardo and Nalisnick, Eric and Janz, David and
            Hern{\\'a}ndez-Lobato, Jos{\\'e} Miguel},
  title = {Sampling-based inference for large linear models, with application to linearised {Laplace}},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
}""",
    "antoran2022adapting": """@inproceedings{antoran2022adapting,
  author = {Antor{\\'a}n, Javier and Janz, David and Allingham, James Urquhart and Daxberger, Erik and Barbano, Riccardo
            and Nalisnick, Eric and Hern{\\'a}ndez-Lobato, Jos{\\'e} Miguel},
  title = {Adapting the Linearised {Laplace} Model Evidence for Modern Deep Learning},
  booktitle = {Proceedings of the 39th International Conference on Machine Learning},
  pages = {796--821},
  year = {2022},
}""",
    "lin2024stochastic": """@inproceedings{lin2024stochastic,
  author = {Lin, Jihao Andreas and Padhy, Shreyas and Antor{\\'a}n, Javier and Tripp, Austin and Terenin, Alexander and
            Szepesv{\\'a}ri, Csaba and Hern{\\'a}ndez-Lobato, Jos{\\'e} Miguel and Janz, David},
  title = {Stochastic Gradient Descent for {Gaussian} Processes Done Right},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
}""",
    "wilson2020efficiently": """@inproceedings{wilson2020efficiently,
  author = {Wilson, James T. and Borovitskiy, Viacheslav and Terenin, Alexander and Mostowsky, Peter and Deisenroth,
            Marc Peter},
  title = {Efficiently Sampling Functions from {Gaussian} Process Posteriors},
  booktitle = {Proceedings of the 37th International Conference on Machine Learning},
  pages = {10292--10302},
  year = {2020},
}""",
}
"""Entries by key."""

BY_CLASS: dict[str, tuple[str, ...]] = {
    "SGLD": ("welling2011bayesian",),
    "SGHMC": ("chen2014stochastic",),
    "FlatBasinSGLD": ("li2024entropy", "welling2011bayesian"),
    "PerturbedSGLD": ("bruno2025flatness", "welling2011bayesian"),
    "AveragedSGLD": ("welling2011bayesian",),
    "SpikeSlabSGHMC": ("ke2022optimization", "deng2019adaptive", "chen2014stochastic"),
    "SymmetryRestricted": ("wiese2023towards",),
    "WGFEnsemble": ("wild2023rigorous",),
    "AutoLinearizedLaplace": ("antoran2023sampling", "antoran2022adapting"),
    "DualDescent": ("lin2024stochastic",),
    "LinearPosterior": ("antoran2023sampling",),
    "GPPosterior": ("wilson2020efficiently", "lin2024stochastic"),
    "NUTS": ("hoffman2014nuts", "neal2012mcmc"),
    "HMC": ("neal2012mcmc",),
    "SteinVI": ("liu2016stein",),
    # what a kernel may be made with
    "Cyclical": ("zhang2020cyclical",),
    "_RMS": ("li2016preconditioned",),
    "_Mirror": ("ke2022optimization",),
}
"""Keys of the papers behind a class, its own first."""

_SOFTWARE = ("phan2019composable", "bingham2019pyro", "jax2018github", "martin2026arviz")


def cite(used: Any) -> str:
    """BibTeX of what was used: papers of the method, then the software.

    The papers are those of the kernel, of the kernel inside it, of its cyclical schedule, of its preconditioner, and of
    the solver of a guide. A kernel or guide that is not known here is named in a comment: cite its own paper.

    :param used: A kernel, an AutoGuide, a posterior of :func:`~numpyro_bdl.gp_posterior_samples` or
        :func:`~numpyro_bdl.linear_posterior_samples`, or a run: :class:`numpyro.infer.MCMC`,
        :class:`numpyro.infer.SVI` or a SteinVI, whose method of particles is cited with its guide.
    :return: BibTeX entries. For numbers by ArviZ, its entry is among them.
    :raises TypeError: for anything else.

    **Example**

    .. doctest::

        >>> import numpyro_bdl as bdl
        >>> from numpyro.infer import NUTS
        >>> text = bdl.cite(bdl.SymmetryRestricted(NUTS(lambda: None)))
        >>> [line.split("{")[1][:-1] for line in text.splitlines() if line.startswith("@")]
        ['wiese2023towards', 'hoffman2014nuts', 'neal2012mcmc', 'numpyro_bdl', 'phan2019composable', 'bingham2019pyro',
        'jax2018github', 'martin2026arviz']
    """
    if isinstance(used, MCMC):
        method = used.sampler
    elif isinstance(used, (SVI, SteinVI)):
        method = used.guide
    else:
        method = used
    if not isinstance(method, (MCMCKernel, AutoGuide, GPPosterior, LinearPosterior)):
        raise TypeError(
            "cite needs a kernel, an AutoGuide, a posterior of a Gaussian process or linear model, or an MCMC, SVI or"
            f" SteinVI object, got {_named(method)}"
            + ("; hand in an object of the class." if isinstance(method, type) else ".")
        )
    keys, unknown = _keys(method)
    if isinstance(used, SteinVI):
        keys = [*(_papers(used) or ()), *keys]
    comments = [f"% {name} has no entry here: cite its own paper." for name in unknown]
    entries = [BIBLIOGRAPHY[key] for key in dict.fromkeys([*keys, "numpyro_bdl", *_SOFTWARE])]
    return "\n\n".join([*comments, *entries])


def _named(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"an object of {type(thing).__name__}"


def _papers(thing: Any) -> tuple[str, ...] | None:
    """The papers of an object by its class or the nearest base that is known."""
    return next((BY_CLASS[base.__name__] for base in type(thing).__mro__ if base.__name__ in BY_CLASS), None)


def _keys(method: Any) -> tuple[list[str], list[str]]:
    """Keys of the papers, and names of what has none."""
    own = _papers(method)
    keys, unknown = list(own or ()), [] if own is not None else [type(method).__name__]
    # of its own, since a kernel that wraps another passes on what it is asked for
    parts = getattr(method, "__dict__", {})
    for part in (parts.get("_schedule"), parts.get("_preconditioner"), parts.get("solver")):
        keys += _papers(part) or ()
    for name in ("kernel", "inner_kernel", "_inner_kernel"):
        if isinstance(parts.get(name), MCMCKernel):
            inner, unknown_inside = _keys(parts[name])
            keys, unknown = keys + inner, unknown + unknown_inside
    return keys, unknown
