def unlearn(): pass
