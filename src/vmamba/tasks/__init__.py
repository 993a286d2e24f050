"""What a VMamba is trained to do. Import the task you need; each brings its own optional dependencies."""
