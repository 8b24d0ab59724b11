"""What a model says of pictures, in parts: tools/predict.py is its command line.

models: a network with its labels and preprocessing; pictures: files, folders and addresses, read in batches; drawing:
what is said on the picture, beside the attention and the class-activation map.
"""
