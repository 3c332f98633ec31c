"""A page in the browser: sample, compare, edit, inpaint, guide, and look at plans.

`page` puts it together. Every other module is one tab: settings, a function from these to results that come as they
form, the command and the program that give the same results, and the layout. The page needs Gradio, which is imported
as the page is made.
"""
