def page(paper): return ""
