"""What folding is made of: the flow of a probe run, the norms in it, the layers around them, who takes in what."""
