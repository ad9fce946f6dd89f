"""The study: when does remasking help?"""
