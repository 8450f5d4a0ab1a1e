"""Pictures of a twin: frames without a display (EGL), and MuJoCo's viewer where there is one."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any, Protocol

import mujoco
import numpy as np

from ..drivers.base import DriverError
from .twin import World

MAX_GEOMS = 2000


class Simulated(Protocol):
    """A twin that can be looked at."""

    @property
    def world(self) -> World:
        """Its physics."""
        ...


class _Canvas:
    """One off-screen GL context for one model and size. Belongs to the thread that made it."""

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        try:
            from mujoco.egl import GLContext
            self.gl = GLContext(width, height)
        except (ImportError, RuntimeError, AttributeError) as error:
            raise DriverError(
                f"rendering needs EGL, which failed here ({error}); install libegl1 and libgl1-mesa-dri"
            ) from None
        self.gl.make_current()
        self.model, self.size = model, (width, height)
        self.scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        # shadows and reflections cost more than all else: 156 -> 950 fps at 64x64 with offsamples 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.option, self.view, self.perturb = mujoco.MjvOption(), mujoco.MjvCamera(), mujoco.MjvPerturb()

    def free(self) -> None:
        """Give the context back."""
        self.gl.make_current()
        self.context.free()
        self.gl.free()


_canvas: _Canvas | None = None  # the last one used: contexts are dear, pictures come in series


def frame(twin: Simulated, width: int = 320, height: int = 240, camera: str = "chase") -> np.ndarray:
    """(height, width, 3) uint8 picture from a camera of the model: chase, top or onboard.

    Raises DriverError without EGL, or for an unknown camera. Call it from one thread only.
    """
    global _canvas
    model, data = twin.world.model, twin.world.data
    cameras = [model.camera(i).name for i in range(model.ncam)]
    if camera not in cameras:
        raise DriverError(f"unknown camera {camera!r}; this twin has {', '.join(cameras)}")
    if not (0 < width <= model.vis.global_.offwidth and 0 < height <= model.vis.global_.offheight):
        most = f"{model.vis.global_.offwidth}x{model.vis.global_.offheight}"
        raise DriverError(f"a frame of {width}x{height} pixels is not possible; at most {most}")
    if _canvas is None or _canvas.model is not model or _canvas.size != (width, height):
        _release()
        _canvas = _Canvas(model, width, height)
        atexit.unregister(_release)
        atexit.register(_release)  # last in, first out: before EGL itself is taken apart
    c = _canvas
    c.gl.make_current()
    c.view.type, c.view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, cameras.index(camera)
    mujoco.mj_kinematics(model, data)  # a step leaves the poses of its beginning behind
    mujoco.mj_camlight(model, data)
    mujoco.mjv_updateScene(
        model, data, c.option, c.perturb, c.view, mujoco.mjtCatBit.mjCAT_ALL.value, c.scene
    )
    viewport, pixels = mujoco.MjrRect(0, 0, width, height), np.empty((height, width, 3), np.uint8)
    mujoco.mjr_render(viewport, c.scene, c.context)
    mujoco.mjr_readPixels(pixels, None, viewport, c.context)
    return pixels[::-1].copy()


def _release() -> None:
    global _canvas
    if _canvas is not None:
        _canvas.free()
        _canvas = None


def view(twin: Simulated) -> Any:
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
