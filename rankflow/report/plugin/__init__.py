"""The tab "Rank flow" of TensorBoard. It imports no torch: TensorBoard's process has none."""
