"""Pictures of a twin: frames without a display (EGL), and MuJoCo's viewer where there is one."""

from __future__ import annotations

import os
import sys
from typing import Any

import mujoco
import numpy as np

from ..drivers.base import DriverError
from .twin import World


class Camera:
    """A camera of a twin's `world` (the car: chase, top, onboard) with its off-screen GL context.

    Belongs to the thread that made it. Raises DriverError without EGL, KeyError for an unknown camera.
    """

    def __init__(self, world: World, width: int = 320, height: int = 240, name: str = "chase") -> None:
        self._model, self._data = world.model, world.data
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._view = mujoco.MjvCamera()
        self._view.type, self._view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera(name).id
        try:
            from mujoco.egl import GLContext
            self._gl = GLContext(width, height)
        except (ImportError, RuntimeError, AttributeError) as error:
            raise DriverError(f"no EGL here ({error}); install libegl1 and libgl1-mesa-dri") from None
        self._gl.make_current()
        self._scene = mujoco.MjvScene(self._model, maxgeom=2000)
        self._model.vis.global_.offwidth, self._model.vis.global_.offheight = width, height
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def frame(self) -> np.ndarray:
        """(height, width, 3) uint8: how it looks now."""
        self._gl.make_current()
        mujoco.mj_kinematics(self._model, self._data)  # a step leaves the poses of its beginning behind
        mujoco.mj_camlight(self._model, self._data)
        option, what = mujoco.MjvOption(), mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, self._data, option, None, self._view, what, self._scene)
        pixels = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, self._viewport, self._context)
        return pixels[::-1].copy()

    def close(self) -> None:
        """Give the context back; the interpreter may not end before."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def view(twin: Any) -> Any:
    """Open MuJoCo's viewer; call `.sync()` on what it returns to refresh, `.close()` to end.

    Raises DriverError where there is no display.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise DriverError("the viewer needs a display, and there is none; leave out --view")
    try:
        import mujoco.viewer
        return mujoco.viewer.launch_passive(twin.world.model, twin.world.data)
    except (ImportError, RuntimeError) as error:
        raise DriverError(f"the viewer did not open ({error}); leave out --view") from None
