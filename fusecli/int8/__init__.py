"""Static int8 quantization of an exported model, by torchao's pt2e flow.

`quantize.plan` exports a model (`export`) and chooses what is computed on integers (`annotate`, `ops`): a
`Plan` of `units`. `quantize.calibrated` carries it out: observers are put in (`flow`, `quantizer`), see the
batches (`calibrate`), and become quantize and dequantize ops. What comes out is written as .pt2 (`saved`) or
as plain tensors (`packed`). Only `torchao` imports torchao.
"""
