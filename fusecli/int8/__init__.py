"""Static int8 quantization of an exported model, by torchao's pt2e flow."""
