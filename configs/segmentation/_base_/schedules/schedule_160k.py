# By its path: see ../default_runtime.py.
_base_ = f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/schedules/schedule_160k.py'
