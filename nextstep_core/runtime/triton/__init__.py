"""Our own kernels, for what a device's libraries do in many launches or by reading weights more than once.

Each is a candidate: it is used where a trial on the device shows that it is right and faster. Triton is no requirement;
without it nothing here is imported but this file and `support.py`.
"""
