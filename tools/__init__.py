"""What the repository needs besides the package itself: conversion, upload, the version matrix, the tiny model."""
