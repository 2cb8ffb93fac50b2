"""The process between data and noise, and the way back.

`process` alone knows what the network predicts (noise, v, x0, flow); `schedules` has the noise levels, `guidance` joins
predictions with and without a condition, `samplers` see nothing but denoise(x, sigma) -> x0.
"""
