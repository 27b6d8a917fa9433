"""Paths whose parameters become infinite or NaN say when, and keep what came before."""

import jax
import jax.numpy as jnp
import numpy as np

from msgd_jax import noise, sde
from tests.library.sde.test_sde import quadratic
from tests.support.problems import of_sde


class TestDivergence:
    def test_the_step_of_divergence_is_reported_and_earlier_points_are_kept(self):
        """A step multiplies theta by 1 - eta H = -99: from 1e29, step 5 overflows float32."""
        losses, data = quadratic(np.eye(1), np.zeros((4, 1)))
        path = of_sde(
            sde.euler_maruyama,
            losses,
            jnp.array([1e29], jnp.float32),
            data,
            noise.gd(4),
            learning_rate=100.0,
            num_steps=50,
            key=jax.random.key(0),
            substeps=1,
            save_at=[0, 2, 4, 5, 6, 50],
        )
        assert path.diverged_at == 5
        np.testing.assert_allclose(
            path.params[:3, 0], [1e29, 1e29 * 99.0**2, 1e29 * 99.0**4], rtol=1e-5
        )
        assert np.isnan(path.params[3:]).all()
        np.testing.assert_allclose(path.last_params, [1e29 * 99.0**4], rtol=1e-5)

    def test_one_diverging_path_leaves_the_others_alone(self):
        losses, data = quadratic(np.eye(1), np.zeros((4, 1)))

        @jax.vmap
        def run(rate):
            return of_sde(
                sde.euler_maruyama,
                losses,
                jnp.ones(1),
                data,
                noise.gd(4),
                learning_rate=rate,
                num_steps=40,
                key=jax.random.key(0),
                substeps=1,
            )

        paths = run(jnp.array([0.5, 100.0]))
        assert paths.diverged_at[0] == -1
        assert 0 < paths.diverged_at[1] <= 40
        np.testing.assert_allclose(paths.params[0], 0.5**40, rtol=1e-3)
