"""The method's mathematics as pure functions of tensors: objectives, advantages, policy loss and presets."""
