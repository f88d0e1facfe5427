"""What is known of a model before anything is done to it?"""
