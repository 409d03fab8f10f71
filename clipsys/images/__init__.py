"""From bytes to pixels.

decoding            hostile files in, RGB images or an `ImageDecodeError` out
native_messages     what C libraries print, named with the image
preprocessing       resizing and cropping to a model's input, as open_clip does and faster
"""
